"""Small programs that call a running server: `make serve`, then `.venv/bin/python -m examples.chat`."""
