from itune.runtime.search.numpy_search import NumpySearch

Search = NumpySearch  # the same interface
