"""HTML pages and pictures of finished results, of whatever modality; nothing here computes a score."""
