@file:JvmName("GraphSupport")

package gemmamtp.core

import java.io.Closeable
import java.io.File
import java.nio.Buffer
import java.nio.FloatBuffer
import java.nio.LongBuffer

// For those who let graphs run on a runtime: what the engines of this project have in common.

/** What helps where a runtime fails in a pass, whose reason is rarely the bundle: memory runs out, or the runtime is at fault. */
public const val REOPEN: String = "close other apps, and open the bundle again"

/** What helps where a runtime cannot load a file. */
public const val RECHECK: String =
    "check its files (`verify`), and copy it again if one has changed, else export it for this version or free some memory"

/**
 * Refuse a bundle that was made for another runtime.
 *
 * @param backend the name in manifests of those that [library] runs.
 * @throws InputError the bundle is none of them.
 */
public fun requireBackend(bundle: File, manifest: Manifest, backend: String, library: String) {
    if (manifest.backend == backend) return
    throw InputError(
        "$bundle: made for backend '${manifest.backend}', expected '$backend', which $library runs; export it with" +
            " --backend $backend, or open it with the engine that runs it",
    )
}

/**
 * Open every graph of a manifest, one after the other; if one fails, close those before it.
 *
 * @param open loads a graph by its name and metadata; what it throws is thrown.
 */
public fun <T : Closeable> openGraphs(manifest: Manifest, open: (String, Graph) -> T): Map<String, T> {
    val opened = LinkedHashMap<String, T>()
    try {
        for ((name, graph) in manifest.graphs) opened[name] = open(name, graph)
    } catch (error: Throwable) { // memory may run out as well
        opened.values.forEach { it.close() }
        throw error
    }
    return opened
}

/** The first line of a runtime's error message; some runtimes append a whole log. */
public fun firstLine(error: Throwable): String =
    error.message?.lineSequence()?.firstOrNull { it.isNotBlank() } ?: error.javaClass.simpleName

/** A copy in direct memory, because outputs of one call may be inputs of the next. */
public fun copied(values: FloatBuffer, shape: LongArray): Tensor =
    Tensor(floats(values.remaining()).also { whole(it.put(values)) }, *shape)

/** A copy in direct memory, as that of floats. */
public fun copied(values: LongBuffer, shape: LongArray): Tensor =
    Tensor(longs(values.remaining()).also { whole(it.put(values)) }, *shape)

/** Make all of a buffer its content. On [Buffer]: FloatBuffer's own `clear` is missing on older phones. */
public fun whole(buffer: Buffer): Buffer = buffer.clear()
