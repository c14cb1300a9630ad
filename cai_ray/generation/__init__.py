"""The vLLM engine, the Ray actors that hold it, and the Ray Data plumbing that feeds rows through them."""
