"""The papers' tables and figures, measured on this machine."""
