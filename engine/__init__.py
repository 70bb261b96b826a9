"""Run time: how an engine directory is opened, verified and executed. Loads neither torch nor transformers."""
