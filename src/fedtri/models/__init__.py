"""Where models come from, which layers are adapted, and PEFT's format in and out."""
