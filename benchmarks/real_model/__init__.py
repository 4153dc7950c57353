"""Unlearning a pretrained language model: fetched, taught the rows to forget, and mapped."""
