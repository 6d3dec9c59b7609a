"""The embedded default: rendered scenes, the language spoken about them, a tiny target model."""
