"""What other programs want of an output folder: subtitles, JSON lines, a folder for Hugging Face's `datasets`."""
