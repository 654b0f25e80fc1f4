package gemmamtp.download

import gemmamtp.core.InputError
import gemmamtp.core.MANIFEST
import gemmamtp.core.hex
import java.io.File
import java.security.MessageDigest
import java.util.Random
import kotlin.test.AfterTest
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith

internal fun sha(bytes: ByteArray) = hex(MessageDigest.getInstance("SHA-256").digest(bytes))

internal fun bytes(seed: Int, size: Int) = ByteArray(size).also { Random(seed.toLong()).nextBytes(it) }

/** A manifest with these files, of which "w" must be one. */
internal fun manifestOf(files: Map<String, ByteArray>): ByteArray {
    val entries = files.map { (name, content) -> """"$name": {"size": ${content.size}, "sha256": "${sha(content)}"}""" }
    val layers = """"num_hidden_layers": 1, "layer_types": ["sliding_attention"]"""
    fun ports(vararg names: String) = names.joinToString(", ", "[", "]") { """{"name": "$it"}""" }
    val target = ports("embedded", "position", "window_start", "output_rows", "key_0")
    return """
        {"format_version": 3, "requires": [{"name": "no-per-layer-embeddings", "since": "0.2.0"}],
         "backend": {"name": "onnx"}, "recipe": "fp32", "max_seq_len": 64,
         "num_draft_tokens": {"default": 4, "max": 8}, "row_multiple": 2,
         "limits": {"num_tokens": 16, "num_outputs": 16, "cache_rows": 65, "window_rows": 256},
         "tokens": {"bos": 2, "eos": [1]},
         "target": {"vocab_size": 10, "hidden_size": 4, "sliding_window": 8, $layers}, "two_stage": null,
         "drafter": {"text": {"vocab_size": 10, "hidden_size": 4, "sliding_window": 8, $layers}},
         "source": {"target": {"files": {}}, "drafter": {"files": {}}},
         "kv": {"buffers": [{"name": "key_0", "layer": 0, "layer_type": "sliding_attention", "num_key_value_heads": 1,
                             "head_dim": 2, "dtype": "float32", "layout": ["num_key_value_heads", "rows", "head_dim"]}]},
         "graphs": {"target": {"file": "w", "inputs": $target, "outputs": ${ports("top_logits", "top_ids", "state", "key_0_out")}},
                    "drafter": {"file": "w", "inputs": ${ports("embedded", "state", "position", "window_start")},
                                "outputs": ${ports("draft_token", "next_state")}}},
         "tables": {"embed_tokens": {"rows": 10, "columns": 4, "row_bytes": 16, "encoding": "float32", "group_size": 4,
                                     "data": {"parts": [{"file": "w", "offset": 0, "rows": 10}]}}},
         "files": {${entries.joinToString(", ")}}}
    """.trimIndent().toByteArray()
}

/** Files of a bundle with its manifest. */
internal fun bundleOf(vararg files: Pair<String, ByteArray>): Map<String, ByteArray> =
    mapOf(*files).let { it + (MANIFEST to manifestOf(it)) }

/** Files that a directory has, hidden ones as well. */
internal fun filesOf(directory: File): Map<String, ByteArray> =
    directory.walk().filter { it.isFile }.associate { it.relativeTo(directory).path to it.readBytes() }

internal fun put(directory: File, files: Map<String, ByteArray>) {
    directory.mkdirs()
    for ((name, content) in files) File(directory, name).writeBytes(content)
}

internal fun assertSame(expected: Map<String, ByteArray>, directory: File) {
    val found = filesOf(directory)
    assertEquals(expected.keys, found.keys)
    for ((name, content) in expected) assertEquals(sha(content), sha(found.getValue(name)), name)
}

/** Thrown by a test to end a download. */
internal class Ended : Exception()

/** A folder, a server that has a bundle, and downloads that do not wait. */
abstract class DownloadCase {
    // In memory, where there is such a folder: each file is flushed to the disk, and there are thousands of files.
    private val memory = File("/dev/shm").takeIf { it.isDirectory && it.canWrite() }
    internal val folder = File.createTempFile("gemmamtp", "", memory).apply { check(delete() && mkdirs()) }
    internal val place = File(folder, "bundle")
    internal val aside = File(folder, "bundle.download")
    internal val server = HostileServer()
    internal val pauses = ArrayList<Int>()
    internal val opened = ArrayList<String>()
    internal var bundle = bundleOf("w" to bytes(1, 1000), "v w" to bytes(2, 250), "empty" to ByteArray(0))
    internal val bundleBytes get() = (bundle - MANIFEST).values.sumOf { it.size }.toLong()

    internal fun part(name: String) = File(aside, ".${sha(bundle.getValue(name))}.part")

    @AfterTest
    fun close() {
        server.close()
        folder.deleteRecursively()
    }

    internal fun serve(files: Map<String, ByteArray> = bundle) {
        bundle = files
        server.files.clear()
        files.forEach { (name, content) -> server.files[name.replace(" ", "%20")] = content }
    }

    internal fun download(
        digest: String = sha(bundle.getValue(MANIFEST)),
        usableSpace: (File) -> Long = { Long.MAX_VALUE },
        url: String = server.url,
        blockBytes: Int = 100,
        readMillis: Int = 20_000,
        progress: DownloadProgress = DownloadProgress { _, _ -> },
        open: (File) -> Unit = { assertSame(bundle, it) },
    ): File {
        val patience = Patience(20_000, readMillis, 2, { pauses.add(it) }, blockBytes, usableSpace)
        return downloadBundle(url, digest, place, patience, progress) {
            opened.add(it.name)
            open(it)
        }
    }

    /** The error of a download, which must have one line. */
    internal fun refused(work: () -> Unit = { download() }): String {
        val line = assertFailsWith<InputError> { work() }.message.orEmpty()
        assertEquals(1, line.lines().size, line)
        return line
    }

    internal fun assertInstalled(files: Map<String, ByteArray> = bundle) {
        assertSame(files, place)
        assertEquals(listOf("bundle", "bundle.lock"), folder.list().orEmpty().sorted())
    }
}
