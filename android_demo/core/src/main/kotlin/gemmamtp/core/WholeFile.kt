package gemmamtp.core

import java.io.File
import java.io.FileOutputStream
import java.io.IOException

/** Nothing is written for so long: what is older was left by a process that was killed. */
private const val LEFTOVER_MILLISECONDS = 3_600_000L

/**
 * Write a file whole or not at all: to another name first, then renamed. Leftovers of killed processes are removed.
 *
 * @throws IOException it cannot be written, for instance for lack of room; a file that was there is as it was.
 */
@Throws(IOException::class)
internal fun writeWhole(file: File, write: (FileOutputStream) -> Unit) {
    val target = file.canonicalFile
    val prefix = ".${target.name}.partial-"
    val oldest = System.currentTimeMillis() - LEFTOVER_MILLISECONDS
    target.parentFile?.listFiles { it.name.startsWith(prefix) && it.lastModified() < oldest }?.forEach { it.delete() }
    val aside = File.createTempFile(prefix, "", target.parentFile)
    try {
        FileOutputStream(aside).use {
            write(it)
            it.fd.sync() // else it may be empty after the battery fails
        }
        if (!aside.renameTo(target)) throw IOException("cannot be replaced")
    } catch (error: Throwable) {
        aside.delete()
        throw error
    }
}
