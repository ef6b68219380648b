"""`foveate serve`: a model behind the HTTP interface that OpenAI's clients speak."""
