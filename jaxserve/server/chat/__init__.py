"""Chats, whichever way they come: messages to token ids, and tools from what is offered to the calls of an answer.

Messages and tools are the mappings of OpenAI's API here, which is what chat templates read.
"""
