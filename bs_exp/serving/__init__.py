"""Compressed models in the servers of others; nothing of a server is imported before it asks for its plug-in."""
