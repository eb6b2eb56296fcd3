"""OpenAI's endpoints: request bodies -> generations -> response bodies and streams."""
