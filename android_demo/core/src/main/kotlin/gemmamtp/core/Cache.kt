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
 * @property windowStart the position that row 0 of sliding layers' buffers holds.
 * @property tensors the buffers by name, as graphs take them; another map whenever one of them is in another place.
 */
class Cache(private val manifest: Manifest, private val allocate: (Long) -> ByteBuffer = ::direct) {
    private val ids = ArrayList<Int>()
    private var buffers = manifest.kv.associate { it.name to CacheBuffer(it, 0, allocate) }
    var windowStart = 0
        private set
    var tensors = buffers.mapValues { it.value.tensor }
        private set

    /**
     * Ids of the tokens whose rows are valid, from position 0 on. They are appended after the pass that wrote the rows, and
     * cut off before a pass that overwrites them, so that they are right whatever ends a pass early.
     */
    val tokens: List<Int> get() = ids

    /** How many rows are valid, and so the position of the next token. */
    val position: Int get() = ids.size

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
    fun canResume(position: Int) = windowStart <= windowStartAt(position)

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
        var start = if (position == 0) 0 else windowStart
        if (position + count - start > windowRows) start = windowStartAt(position)
        val moved = if (position == 0) 0 else start - windowStart
        val larger = HashMap<String, CacheBuffer>()
        for (kv in manifest.kv) {
            val used = position + count - if (kv.sliding) start else 0
            val limit = if (kv.sliding) windowRows else manifest.limits.getValue("cache_rows")
            if (used > buffers.getValue(kv.name).rows) {
                larger[kv.name] = CacheBuffer(kv, minOf(roundUp(used, CACHE_STEP_ROWS), limit), allocate)
            }
        }
        if (larger.isEmpty() && moved == 0) {
            windowStart = start
            return
        }
        val all = buffers + larger
        val allTensors = if (larger.isEmpty()) tensors else all.mapValues { it.value.tensor }
        val valid = ids.toList()
        ids.clear() // until all rows are where they belong, whatever happens here
        for (kv in manifest.kv) {
            val by = if (kv.sliding) moved else 0
            val kept = valid.size - if (kv.sliding) start else 0
            if (by > 0 || kv.name in larger) all.getValue(kv.name).copy(buffers.getValue(kv.name), by, kept)
        }
        buffers = all
        tensors = allTensors
        windowStart = start
        ids.addAll(valid)
    }

    /** The last position at which sliding layers' buffers may begin for tokens from a position on. */
    private fun windowStartAt(position: Int) =
        (maxOf(0L, position - manifest.slidingWindow.toLong() - 2) / SLIDE_ROWS * SLIDE_ROWS).toInt()
}
