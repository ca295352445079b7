"""Model against recording, recording against recording."""
