"""The HTTP front: questions about streams in the form of OpenAI's API, and what the streams are."""
