package gemmamtp.download

import gemmamtp.core.FileMetadata
import gemmamtp.core.InputError
import gemmamtp.core.hex
import gemmamtp.core.oneLine
import java.io.Closeable
import java.io.File
import java.io.IOException
import java.io.RandomAccessFile
import java.security.MessageDigest

/**
 * A file of the bundle that is not whole yet, digested while it grows.
 *
 * @param path where it is until then.
 * @param metadata what it will be.
 * @param count is told of bytes.
 */
internal class Part(private val path: File, metadata: FileMetadata, private val count: Count) : Closeable {
    private val disk = onDisk(path) { RandomAccessFile(path, "rw") }
    private val digest = MessageDigest.getInstance("SHA-256")
    val size = metadata.size
    val expected = metadata.sha256

    /** Bytes that are on the disk and digested. */
    var length = 0L
        private set

    /** Hexadecimal, of the bytes so far. */
    val sha256: String get() = hex((digest.clone() as MessageDigest).digest())

    /** Digest what an earlier run left. */
    fun digestFound(block: ByteArray) {
        onDisk(path) { if (disk.length() > size) disk.setLength(size) }
        while (length < size) {
            val bytes = onDisk(path) { disk.read(block) }
            if (bytes < 0) break
            digested(block, bytes)
        }
    }

    /** Append the first [bytes] of a block. */
    fun write(block: ByteArray, bytes: Int) {
        onDisk(path) { disk.write(block, 0, bytes) }
        digested(block, bytes)
    }

    private fun digested(block: ByteArray, bytes: Int) {
        digest.update(block, 0, bytes)
        length += bytes
        count.add(bytes.toLong())
    }

    /** Give a whole file its name; wrong bytes go. Returns whether it has it now. */
    fun moveTo(file: File): Boolean {
        if (length < size) return false
        if (sha256 != expected) {
            clear()
            return false
        }
        onDisk(path) {
            disk.fd.sync() // a file with its name must not lose bytes when the battery fails
            if (!path.renameTo(file)) throw IOException("cannot be renamed to ${file.name}")
        }
        return true
    }

    private fun clear() {
        onDisk(path) { disk.setLength(0) }
        val dropped = length
        length = 0
        digest.reset()
        count.add(-dropped)
    }

    override fun close() = disk.close()
}

/** Run [work] on the disk; throws InputError, which names [path], where it fails. */
internal fun <T> onDisk(path: File, work: () -> T): T =
    try {
        work()
    } catch (error: IOException) {
        throw InputError("$path: cannot be read or written (${oneLine(error)}); make room, or choose another place", error)
    }
