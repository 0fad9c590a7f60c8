"""Serve models over HTTP on this computer: OpenAI's API, TSOTSALLM's service API, a page to talk to them, and a studio."""
