"""What the pipeline stands on: the embedded broker and deployment files."""
