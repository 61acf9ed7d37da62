"""Clients that a server has to live with: those that check every token, and those that break off or break in."""
