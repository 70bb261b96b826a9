"""Each family's UNet or transformer as a plain torch module that is traced."""
