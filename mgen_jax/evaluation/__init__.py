"""How good is it: reconstruction, alignment with the prompt, and the report that shows it."""
