"""The service: matches over HTTP, and the client that asks for them."""
