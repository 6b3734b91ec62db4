"""Code that travels with an export. Nothing here is imported by mediatorize: `standalone` reads it as text."""
