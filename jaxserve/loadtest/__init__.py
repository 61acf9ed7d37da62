"""A server measured from outside: requests that arrive when they will, and what the server adds to its engine."""
