"""What several formats share: cursors, bounded decompression, capture metadata, accounts of loss."""
