"""memedge inside other libraries; each module loads its library's, and this package none."""
