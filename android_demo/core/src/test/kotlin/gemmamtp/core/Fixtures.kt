package gemmamtp.core

import java.io.File

/** A manifest of a small model; a test names the sizes that matter to it. */
internal fun smallManifest(
    vocabSize: Int,
    maxSeqLen: Int,
    maxDraftTokens: Int,
    eos: Set<Int> = emptySet(),
    slidingWindow: Int = 8,
    numTokens: Int = 16,
    rowMultiple: Int = 1,
    kv: List<KVBuffer> = emptyList(),
    tables: Map<String, TableMetadata> = emptyMap(),
    hiddenSize: Int = 1,
    softcap: Double = 0.0,
    suppressed: Set<Int> = emptySet(),
    channels: Map<String, Pair<Int, Int>> = emptyMap(),
    parts: Map<String, PartForm> = emptyMap(),
    digest: String = "",
    files: Map<String, FileMetadata> = emptyMap(),
) = Manifest(
    backend = "fake",
    minRuntime = null,
    recipe = "fp32",
    vocabSize = vocabSize,
    hiddenSize = hiddenSize,
    slidingWindow = slidingWindow,
    finalLogitSoftcapping = softcap,
    maxSeqLen = maxSeqLen,
    defaultDraftTokens = minOf(4, maxDraftTokens),
    maxDraftTokens = maxDraftTokens,
    limits = mapOf(
        "num_tokens" to numTokens,
        "num_outputs" to numTokens,
        "cache_rows" to maxSeqLen + rowMultiple - 1,
        "window_rows" to windowRows(slidingWindow, numTokens).toInt(),
    ),
    rowMultiple = rowMultiple,
    sampling = Sampling(),
    repetitionPenalty = 1.0,
    bos = 2,
    eos = eos,
    suppressed = suppressed,
    channels = channels,
    parts = parts,
    kv = kv,
    graphs = emptyMap(),
    tables = tables,
    files = files,
    chat = null,
    conversations = emptyList(),
    tools = null,
    digest = digest,
)

/** Run [work] with a new directory, and remove the directory. */
fun inTemporaryDirectory(work: (File) -> Unit) {
    val directory = File.createTempFile("gemmamtp", "").apply { delete() }
    check(directory.mkdirs())
    try {
        work(directory)
    } finally {
        directory.deleteRecursively()
    }
}
