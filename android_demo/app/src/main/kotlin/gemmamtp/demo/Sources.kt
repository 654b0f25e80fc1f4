package gemmamtp.demo

import android.content.ContentResolver
import android.content.Intent
import android.content.res.AssetManager
import android.net.Uri
import android.provider.DocumentsContract
import android.provider.DocumentsContract.Document
import gemmamtp.core.MANIFEST
import java.io.IOException
import java.io.InputStream

private const val ASSETS = "bundle"

/** The bundle in the APK's assets. */
class AssetSource(private val assets: AssetManager, override val name: String) : BundleSource {
    /** Whether the APK has a bundle. */
    val exists: Boolean get() = MANIFEST in assets.list(ASSETS).orEmpty()

    override fun files() = assets.list(ASSETS).orEmpty().map { name ->
        val path = "$ASSETS/$name"
        SourceFile(name, assets.open(path).use { it.available().toLong() }) { assets.open(path) }
    }

    override fun close() = Unit
}

/** A folder from the system's picker; the permission to read it is held until it is closed. */
class TreeSource(private val resolver: ContentResolver, private val tree: Uri) : BundleSource {
    private val id = DocumentsContract.getTreeDocumentId(tree)

    init {
        try { // else the permission ends with the activity, and copying may take longer
            resolver.takePersistableUriPermission(tree, Intent.FLAG_GRANT_READ_URI_PERMISSION)
        } catch (_: SecurityException) {
            // the provider gives no permission that lasts
        }
    }

    override val name: String by lazy {
        val folder = DocumentsContract.buildDocumentUriUsingTree(tree, id)
        val names = rows(folder, Document.COLUMN_DISPLAY_NAME) { it[0] }
        names.firstOrNull() ?: throw IOException("the folder has no name")
    }

    override fun files(): List<SourceFile> {
        val children = DocumentsContract.buildChildDocumentsUriUsingTree(tree, id)
        val columns = arrayOf(
            Document.COLUMN_DOCUMENT_ID, Document.COLUMN_DISPLAY_NAME, Document.COLUMN_SIZE, Document.COLUMN_MIME_TYPE,
        )
        return rows(children, *columns) { (document, name, size, type) ->
            if (type == Document.MIME_TYPE_DIR || document == null || name == null) return@rows null
            val file = DocumentsContract.buildDocumentUriUsingTree(tree, document)
            SourceFile(name, size?.toLongOrNull() ?: 0) { open(file) }
        }.filterNotNull()
    }

    override fun close() {
        try {
            resolver.releasePersistableUriPermission(tree, Intent.FLAG_GRANT_READ_URI_PERMISSION)
        } catch (_: SecurityException) {
            // there was none
        }
    }

    private fun open(file: Uri): InputStream =
        asIO { resolver.openInputStream(file) } ?: throw IOException("the folder's app does not give $file")

    private fun <T> rows(uri: Uri, vararg columns: String, row: (List<String?>) -> T): List<T> = asIO {
        val cursor = resolver.query(uri, columns, null, null, null)
            ?: throw IOException("the folder's app does not answer")
        cursor.use { List(it.count) { at -> it.moveToPosition(at); row(columns.indices.map(it::getString)) } }
    }

    /** Providers are other apps, which may throw anything. */
    private fun <T> asIO(ask: () -> T): T = try {
        ask()
    } catch (error: RuntimeException) {
        throw IOException(error.message ?: error.javaClass.simpleName, error)
    }
}
