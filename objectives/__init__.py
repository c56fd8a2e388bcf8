"""Objectives besides the study's own, one a file; pretrain.py names them in OBJECTIVES. Some share masks and tokenizers."""
