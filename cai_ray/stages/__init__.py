"""The nine stages, one file and one function each: `stage(config, inputs, out) -> Manifest`."""
