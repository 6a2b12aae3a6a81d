"""The command line: sound in, frames out."""
