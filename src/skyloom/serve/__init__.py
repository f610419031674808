"""The server: the API, durable jobs, workers that do them, storage of what they make."""
