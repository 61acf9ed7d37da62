"""The OpenAI-compatible HTTP front end, beside gRPC in one process and on one event loop.

``listener`` binds and runs uvicorn, ``guard`` stands before every request (tokens, sizes, counts), ``app`` gathers the
routes, ``fields`` says what a body may have, ``generation`` runs engine requests, ``errors`` answers in OpenAI's shape.
"""
