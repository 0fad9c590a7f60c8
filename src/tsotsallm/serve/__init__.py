"""Models over HTTP on this computer: OpenAI's API, the first work's own, a page to talk on, a studio to make models in."""
