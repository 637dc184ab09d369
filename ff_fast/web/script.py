"""The browser client, as the file that it is."""

from __future__ import annotations

from pathlib import Path

CLIENT_JS = Path(__file__).with_name("client.js")
"""The browser client, an ES module, for whatever serves an application's static files."""
