"""Small programs that talk to a running server: `make serve`, then `.venv/bin/python -m examples.chat`."""
