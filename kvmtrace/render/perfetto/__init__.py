"""Timelines for the Perfetto viewer: one content, written as protobuf (.pftrace) or as JSON (.perfetto.json)."""
