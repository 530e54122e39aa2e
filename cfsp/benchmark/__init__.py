"""The parts of ``cfsp benchmark``: each measures one thing, says what it found and which limits were missed."""
