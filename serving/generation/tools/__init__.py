"""Tools: how they are described in the prompt, and how calls are parsed from the answer."""
