"""What decodes: target, draft heads, trees, acceptance, and `SpecModel` over them."""
