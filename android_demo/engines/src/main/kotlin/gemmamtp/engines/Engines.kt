package gemmamtp.engines

import gemmamtp.core.BoundGraph
import gemmamtp.core.Graph
import gemmamtp.core.InputError
import gemmamtp.core.LoadGraphs
import gemmamtp.core.Manifest
import java.io.Closeable
import java.io.File

/** The runtimes that this app has, by the name of the backend in a bundle's manifest. */
object Engines : LoadGraphs {
    private val loaders = mapOf("onnx" to ::loadOrt, "executorch" to ::loadEt)

    override fun load(bundle: File, manifest: Manifest, threads: Int?): Map<String, BoundGraph> {
        val load = loaders[manifest.backend]
            ?: throw InputError("$bundle: its backend is ${manifest.backend}, this app runs ${loaders.keys.joinToString(" and ")}")
        return load(bundle, manifest, threads)
    }
}

/** Every graph of a manifest, opened one after the other; if one fails, those before it are closed. */
internal fun <T : Closeable> openGraphs(manifest: Manifest, open: (String, Graph) -> T): Map<String, T> {
    val opened = LinkedHashMap<String, T>()
    try {
        for ((name, graph) in manifest.graphs) opened[name] = open(name, graph)
    } catch (error: InputError) {
        opened.values.forEach { it.close() }
        throw error
    }
    return opened
}

/** The first line of what a runtime has to say; some of them append a whole log. */
internal fun line(error: Throwable): String =
    error.message?.lineSequence()?.firstOrNull { it.isNotBlank() } ?: error.javaClass.simpleName
