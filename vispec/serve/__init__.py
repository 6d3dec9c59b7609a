"""An OpenAI-style server over `SpecModel`."""
