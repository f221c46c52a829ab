"""The `loraplex` command: the one place that crosses layers, and it imports the heavy ones only where they are used."""
