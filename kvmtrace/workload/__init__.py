"""The bundled tiny VMM and its guests."""
