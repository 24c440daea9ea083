"""gensim: LdaMulticore. Its work is done in the initializer of a Pool, which never returns."""

from typing import Any

import numpy as np
from gensim.corpora import Dictionary
from gensim.models.ldamulticore import LdaMulticore

from compat_tests.clients.doors import Doors, foreign

_TEXTS = [text.split() for text in ("human machine interface", "survey user computer system response time",
                                    "system human system trees", "user response time graph", "trees graph minors",
                                    "graph minors survey", "interface user trees", "machine time minors")] * 5


@foreign
def topics(doors: Doors) -> Any:
    dictionary = Dictionary(_TEXTS)
    corpus = [dictionary.doc2bow(text) for text in _TEXTS]
    with doors.imported("gensim.models.ldamulticore"):
        # One worker and one chunk a pass: otherwise the result depends on which of them was faster.
        model = LdaMulticore(corpus, num_topics=3, id2word=dictionary, workers=1, chunksize=len(corpus), passes=4,
                             random_state=np.random.RandomState(9), eval_every=None)
    return model.get_topics()
