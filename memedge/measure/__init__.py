"""What scoring costs on this machine."""
