"""The vLLM engine, in a server or in this process."""
