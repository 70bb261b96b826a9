"""Float32 graphs in fp16 and int8, and how far that moves what they compute."""
