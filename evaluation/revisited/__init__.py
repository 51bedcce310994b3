"""Revisited Oxford and Paris, with any number of distractors.

Source: Radenovic, Iscen, Tolias, Avrithis, Chum 2018, "Revisiting Oxford and Paris", arXiv:1803.11285, section 3.
"""
