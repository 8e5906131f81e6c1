"""Two small trainings with tables and pictures: `python -m trainax_pk.demo`."""
