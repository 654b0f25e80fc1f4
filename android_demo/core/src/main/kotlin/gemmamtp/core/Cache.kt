package gemmamtp.core

import java.nio.ByteBuffer

/** The cache grows by these: short texts stay small, and growing is too rare to matter. */
private const val CACHE_STEP_ROWS = 256

/**
 * What one conversation has in memory: whose keys and values, and the buffers that they are in.
 *
 * It starts small and grows up to the manifest's limits. Buffers of sliding layers stop growing at the size of their window;
 * their rows move up in steps of [SLIDE_ROWS]. Rows from [position] on hold anything, for instance those of rejected drafts;
 * later passes overwrite them. One thread at a time may use it.
 *
 * @param manifest of the bundle whose keys and values it holds.
 * @param allocate gives so many bytes of zeros in direct memory of native byte order: what masked rows hold is multiplied by
 *     0, so it must be a number.
 * @property state the target's of the newest token of the last pass, E numbers, from which drafting goes on.
 * @property windowStart the position that row 0 of sliding layers' buffers holds; 0 while no row is valid.
 * @property tensors the buffers by name, as graphs take them; another map whenever one of them is in another place.
 */
internal class Cache(private val manifest: Manifest, private val allocate: (Long) -> ByteBuffer = ::direct) {
    private val ids = ArrayList<Int>()
    private var buffers = manifest.kv.associate { it.name to CacheBuffer(it, 0, allocate) }
    val state = floats(manifest.hiddenSize)
    private var slidingStart = 0
    val windowStart: Int get() = if (ids.isEmpty()) 0 else slidingStart
    var tensors = buffers.mapValues { it.value.tensor }
        private set

    /**
     * Ids of the tokens whose rows are valid, from position 0 on. They are appended after the pass that wrote the rows, and
     * cut off before a pass that overwrites them, so that they are right whatever ends a pass early.
     */
    val tokens: List<Int> get() = ids

    /** How many rows are valid, and so the position of the next token. */
    val position: Int get() = ids.size

    /** Bytes of all buffers. */
    val numBytes: Long get() = buffers.values.sumOf { it.numBytes }

    /** Count these tokens as valid: a pass has written their rows from [position] on. */
    fun append(tokens: List<Int>) {
        ids.addAll(tokens)
    }

    /** Keep only the rows before a position. */
    fun rollBack(position: Int) {
        check(position <= ids.size) { "$position cache rows asked for, only ${ids.size} are valid" }
        ids.subList(position, ids.size).clear()
    }

    /** Whether it still has every row that tokens from this position on attend to. */
    fun canResume(position: Int) = windowStart <= windowStartAt(manifest, position)

    /** How many of a prompt's first tokens need not be run again; its last token always is. */
    fun reusable(prompt: List<Int>): Int {
        val shared = commonPrefix(ids, prompt.dropLast(1))
        return if (canResume(shared)) shared else 0
    }

    /**
     * Make room for [count] rows from [position] on: move sliding layers' rows up, and grow.
     *
     * @throws OutOfMemoryError there is no memory for larger buffers; the cache is as it was.
     */
    fun makeRoom(count: Int) {
        val windowRows = manifest.limits.getValue("window_rows")
        var start = windowStart
        if (position + count - start > windowRows) start = windowStartAt(manifest, position)
        val moved = start - windowStart
        val larger = HashMap<String, CacheBuffer>()
        for (kv in manifest.kv) {
            val used = usedRows(kv, position + count, start)
            if (used <= buffers.getValue(kv.name).rows) continue
            larger[kv.name] = CacheBuffer(kv, bufferRows(manifest, kv, used), allocate)
        }
        if (larger.isEmpty() && moved == 0) {
            slidingStart = start
            return
        }
        val all = buffers + larger
        val allTensors = if (larger.isEmpty()) tensors else all.mapValues { it.value.tensor }
        val valid = ids.toList()
        ids.clear() // until all rows are where they belong, whatever happens here
        for (kv in manifest.kv) {
            val by = if (kv.sliding) moved else 0
            val kept = usedRows(kv, valid.size, start)
            if (by > 0 || kv.name in larger) all.getValue(kv.name).copy(buffers.getValue(kv.name), by, kept)
        }
        buffers = all
        tensors = allTensors
        slidingStart = start
        ids.addAll(valid)
    }

    /**
     * Take these keys and values in place of what it holds.
     *
     * @param tokens whose they are.
     * @param saved a buffer for each of the manifest's.
     */
    internal fun restore(tokens: List<Int>, windowStart: Int, saved: Map<String, CacheBuffer>) {
        ids.clear()
        buffers = saved
        tensors = saved.mapValues { it.value.tensor }
        slidingStart = windowStart
        ids.addAll(tokens)
    }

    /** Write a buffer's rows as [CacheBuffer.write] does, of which only those of [tokens] are not zeros. */
    internal fun write(kv: KVBuffer, out: (ByteBuffer) -> Unit) {
        val used = usedRows(kv, position, windowStart)
        buffers.getValue(kv.name).write(used, bufferRows(manifest, kv, used), out)
    }
}

/** How many rows of a buffer belong to the tokens before [position]. */
internal fun usedRows(kv: KVBuffer, position: Int, windowStart: Int) = position - if (kv.sliding) windowStart else 0

/** Rows of a buffer that is made for [used] of them. */
internal fun bufferRows(manifest: Manifest, kv: KVBuffer, used: Int) =
    minOf(roundUp(used, CACHE_STEP_ROWS), maxRows(manifest, kv))

/** The most rows that a buffer has. */
internal fun maxRows(manifest: Manifest, kv: KVBuffer) =
    manifest.limits.getValue(if (kv.sliding) "window_rows" else "cache_rows")

/** The last position at which sliding layers' buffers may begin for tokens from a position on. */
internal fun windowStartAt(manifest: Manifest, position: Int) =
    (maxOf(0L, position - manifest.slidingWindow.toLong() - 2) / SLIDE_ROWS * SLIDE_ROWS).toInt()
